# SPDX-License-Identifier: Apache-2.0
"""The symbols of vLLM that the plugin touches, as data; ``tests/unit/compat/test_symbols.py`` looks each of them up."""

from __future__ import annotations

from typing import Final

V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
FLASH_ATTENTION = "vllm.v1.attention.backends.flash_attn"
TRITON_ATTENTION = "vllm.v1.attention.backends.triton_attn"
LOGITS_PROCESSOR = "vllm.model_executor.layers.logits_processor:LogitsProcessor"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
STRUCTURED_OUTPUT = "vllm.v1.structured_output:StructuredOutputManager"
GRAMMAR = "vllm.v1.structured_output.backend_types:StructuredOutputGrammar"
DRAFT_TOKENS_HANDLER = "vllm.v1.worker.gpu.spec_decode.utils:DraftTokensHandler"
GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager"
BUDGET = "vllm.v1.worker.gpu.spec_decode.adaptive_verification"
FORWARD = "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale"
BUILD = "self, common_prefix_len, common_attn_metadata, fast_build"

SIGNATURES: Final = {  # ", ...": versions may have further ones with defaults.
    # Wrapped or replaced by patches.
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": "self, target_model_config, target_parallel_config",
    "vllm.sampling_params:SamplingParams._validate_spec_decode": "self, speculative_config",
    "vllm.config.vllm:VllmConfig._set_cudagraph_sizes": "self",
    "vllm.v1.sample.logits_processor:build_logitsprocs": (
        "vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs"
    ),
    "vllm.v1.worker.gpu.spec_decode:init_speculator": "vllm_config, device, req_states",
    # Overridden: model runner V1.
    f"{V1}.__init__": "self, vllm_config, device",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model": "self, load_dummy_weights",
    f"{V1}.initialize_kv_cache": "self, kv_cache_config, is_profiling, kv_cache_allocation_context",
    f"{V1}.execute_model": "self, scheduler_output, intermediate_tensors",
    f"{V1}._prepare_inputs": "self, scheduler_output, num_scheduled_tokens",
    f"{V1}._build_attention_metadata": (
        "self, num_tokens, num_reqs, max_query_len, num_tokens_padded, num_reqs_padded, ubatch_slices, logits_indices, "
        "max_num_sampled_tokens, use_spec_decode, for_cudagraph_capture, num_scheduled_tokens, slot_mappings"
    ),
    f"{V1}._sample": "self, logits, spec_decode_metadata",
    f"{V1}._bookkeeping_sync": ("self, scheduler_output, sampler_output, logits, hidden_states, num_scheduled_tokens"),
    f"{V1}._input_fits_in_drafter": "self, common_attn_metadata",
    f"{V1}.propose_draft_token_ids": (
        "self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states, "
        "aux_hidden_states, spec_decode_metadata, common_attn_metadata, slot_mappings"
    ),
    # Overridden: model runner V2.
    f"{V2}.__init__": "self, vllm_config, device",
    f"{V2}.load_model": "self, load_dummy_weights, *args, model, **kwargs",
    f"{V2}.initialize_kv_cache": "self, kv_cache_config, is_profiling, kv_cache_allocation_context",
    f"{V2}.add_requests": "self, scheduler_output",
    f"{V2}.prepare_attn": "self, input_batch",
    f"{V2}.get_draft_model": "self",
    f"{V2}.sample": "self, hidden_states, input_batch, grammar_output",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager": "self, cudagraph_mode",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture": "self",
    f"{GRAPHS}.__init__": (
        "self, vllm_config, device, cudagraph_mode, decode_query_len, lora_capture_cases, varlen_decode, ubatch_runner"
    ),
    f"{GRAPHS}.capture": "self, create_forward_fn, progress_bar_desc",
    f"{GRAPHS}.dispatch": (
        "self, num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len, num_ubatches"
    ),
    f"{GRAPHS}.run_fullgraph": "self, desc",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose": (
        "self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, "
        "num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, dp_sync_state, dummy_run, "
        "skip_attn_for_dummy_run, mm_inputs, is_profile, num_speculative_tokens"
    ),
    # Overridden: V2's adaptive verification, whose constructor gets what vLLM gives it.
    f"{BUDGET}:AdaptiveVerificationManager.get_num_tokens": "self, num_tokens_per_req, draft_tokens",
    f"{BUDGET}:AdaptiveVerificationManager.add_request": "self, req_idx",
    f"{BUDGET}:AdaptiveVerificationManager.record_confidences": "self, confidence_probs, input_batch",
    f"{BUDGET}:AdaptiveVerificationManager.set_cost_curves": "self, draft_curve, verify_curve",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.get_varlen_cudagraph_max_query_len": (
        "cls, vllm_config, kv_cache_spec"
    ),
    # Overridden: the worker and attention.
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device": "self",
    "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model": "self",
    f"{CPU_ATTENTION}:CPUAttentionMetadataBuilder._set_isa_to_layers": "self, layer_names",
    f"{CPU_ATTENTION}:CPUAttentionMetadataBuilder.build": BUILD,
    f"{CPU_ATTENTION}:CPUAttentionBackendImpl.forward": FORWARD,
    f"{CPU_ATTENTION}:CPUAttentionBackend.get_impl_cls": "",
    f"{CPU_ATTENTION}:CPUAttentionBackend.get_builder_cls": "",
    "vllm.v1.worker.gpu_worker:Worker._make_model_runner": "self",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support": "cls, vllm_config, kv_cache_spec",
    f"{FLASH_ATTENTION}:FlashAttentionMetadataBuilder.__init__": (
        "self, kv_cache_spec, layer_names, vllm_config, device"
    ),
    f"{FLASH_ATTENTION}:FlashAttentionMetadataBuilder.build": BUILD,
    f"{FLASH_ATTENTION}:FlashAttentionMetadataBuilder.build_for_cudagraph_capture": "self, common_attn_metadata",
    f"{FLASH_ATTENTION}:FlashAttentionImpl.forward": FORWARD,
    f"{TRITON_ATTENTION}:TritonAttentionMetadataBuilder.__init__": (
        "self, kv_cache_spec, layer_names, vllm_config, device"
    ),
    f"{TRITON_ATTENTION}:TritonAttentionMetadataBuilder.build": BUILD,
    f"{TRITON_ATTENTION}:TritonAttentionMetadataBuilder.build_for_cudagraph_capture": "self, common_attn_metadata",
    f"{TRITON_ATTENTION}:TritonAttentionImpl.forward": FORWARD,
    # Overridden: the logger of statistics.
    "vllm.v1.metrics.loggers:StatLoggerBase.__init__": "self, vllm_config, engine_index",
    "vllm.v1.metrics.loggers:StatLoggerBase.record": (
        "self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx"
    ),
    "vllm.v1.metrics.loggers:StatLoggerBase.log": "self",
    "vllm.v1.metrics.loggers:StatLoggerBase.log_engine_initialized": "self",
    # Overridden: structured output.
    f"{STRUCTURED_OUTPUT}.__init__": "self, vllm_config",
    f"{STRUCTURED_OUTPUT}.validate_tokens": "self, request, spec_tokens",
    f"{STRUCTURED_OUTPUT}.grammar_bitmask": (
        "self, requests, structured_output_request_ids, scheduled_spec_decode_tokens"
    ),
    f"{DRAFT_TOKENS_HANDLER}.__init__": "self, device",
    f"{DRAFT_TOKENS_HANDLER}.set_draft_tokens": "self, input_batch, draft_tokens",
    f"{DRAFT_TOKENS_HANDLER}.get_draft_tokens": "self",
    # Overridden: the LM heads' weights and products.
    f"{EMBEDDING}:VocabParallelEmbedding.__init__": (
        "self, num_embeddings, embedding_dim, params_dtype, org_num_embeddings, padding_size, quant_config, prefix, "
        "disable_tp, reduce_results, quant_method, parallel_group"
    ),
    f"{EMBEDDING}:UnquantizedEmbeddingMethod.create_weights": (
        "self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, "
        "**extra_weight_attrs"
    ),
    f"{EMBEDDING}:UnquantizedEmbeddingMethod.process_weights_after_loading": "self, layer",
    f"{EMBEDDING}:UnquantizedEmbeddingMethod.apply": "self, layer, x, bias",
    # Stood in for: V2 calls our verifier as it calls this.
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__call__": (
        "self, logits, input_batch, draft_logits, invalid_drafts"
    ),
    # Called.
    "vllm.config.speculative:SpeculativeConfig.create_draft_parallel_config": (
        "target_parallel_config, speculative_draft_tensor_parallel_size, draft_model_config"
    ),
    "vllm.model_executor.model_loader:get_model": "vllm_config, model_config, prefix, load_config",
    "vllm.model_executor.layers.linear:ReplicatedLinear.__init__": (
        "self, input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix, return_bias, "
        "disable_tp"
    ),
    f"{LOGITS_PROCESSOR}.__init__": "self, vocab_size, org_vocab_size, scale, logits_as_input, soft_cap",
    f"{LOGITS_PROCESSOR}.forward": "self, lm_head, hidden_states, embedding_bias, skip_gather",
    f"{LOGITS_PROCESSOR}.get_top_k_tokens": "self, lm_head, hidden_states, k, embedding_bias, return_log_probs",
    "vllm.model_executor.models.registry:_ModelRegistry.register_model": "self, model_arch, model_cls",
    "vllm.v1.attention.backends.registry:register_backend": "backend, class_path, is_mamba",
    "vllm.vllm_flash_attn.flash_attn_interface:get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype, "
        "headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size, "
        "has_softcap, num_splits, pack_gqa, sm_margin"
    ),
    "vllm.utils.torch_utils:canonicalize_singleton_dim_strides": "t",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.clear_override": "self",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_path": "self, include_classname",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.is_overridden": "self",
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": "vllm_config",
    f"{V1}._attn_group_iterator": "self",
    f"{V1}._dummy_run": (
        "self, num_tokens, cudagraph_runtime_mode, force_attention, uniform_decode, allow_microbatching, skip_eplb, "
        "is_profile, create_mixed_batch, remove_lora, is_graph_capturing, num_active_loras, profile_seq_lens, "
        "randomize_inputs"
    ),
    "vllm.distributed.parallel_state:get_tp_group": "",
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object": "self, obj, src",
    "vllm.config.model:ModelConfig.compute_hash": "self",
    f"{CPU_ATTENTION}:CPUAttentionBackendImpl.do_kv_cache_update": "self, layer, key, value, kv_cache, slot_mapping",
    "vllm.v1.sample.sampler:Sampler.forward": (
        "self, logits, sampling_metadata, predict_bonus_token, logprobs_mode_override"
    ),
    "vllm.v1.sample.sampler:Sampler.greedy_sample": "logits",
    "vllm.v1.sample.sampler:Sampler.__init__": "self, logprobs_mode, use_fp64_gumbel",
    "vllm.v1.sample.sampler:Sampler.sample": "self, logits, sampling_metadata, logprobs_mode_override",
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p": "logits, k, p, ...",
    "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_native": "self, logits, generators, k, p",
    "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params": (
        "self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos, "
        "seq_lens_upper_bound_np, skip_top_k_top_p"
    ),
    "vllm.v1.worker.gpu.sample.sampler:Sampler.sample": (
        "self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos, "
        "seq_lens_upper_bound_np, return_logprobs"
    ),
    "vllm.v1.worker.gpu.sample.sampler:Sampler.get_logprobs_dims": "self, idx_mapping_np, include_token_ids",
    "vllm.v1.worker.gpu.sample.output:SamplingMaskTensors.from_logits": (
        "cls, logits, cu_num_logits, num_sampled_tokens, max_num_kept, rows_per_request"
    ),
    "vllm.v1.worker.gpu.sample.output:SamplingMaskTensors.cat": "cls, chunks",
    "vllm.v1.outputs:LogprobsTensors.cat": "tensors, cu_num_generated_tokens",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:get_max_chunk_logits": "vocab_size",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:_iter_request_chunks": "cu_num_logits, max_chunk_logits",
    "vllm.v1.worker.gpu.sample.logprob:compute_topk_scores": (
        "logits, num_logprobs, sampled_token_ids, cu_num_logits, logprob_token_ids_state, expanded_idx_mapping, "
        "max_per_req_token_ids, logits_mode"
    ),
    "vllm.v1.worker.gpu.metrics.logits:get_num_nans": "logits",
    f"{STRUCTURED_OUTPUT}._get_constraint_bounds": "self, request, spec_tokens, spec_tokens_committed",
    f"{GRAMMAR}.accept_tokens": "self, request_id, tokens",
    f"{GRAMMAR}.validate_tokens": "self, tokens",
    f"{GRAMMAR}.rollback": "self, num_tokens",
    f"{GRAMMAR}.fill_bitmask": "self, bitmask, batch_index",
    f"{GRAMMAR}.is_terminated": "self",
    "vllm.v1.structured_output.utils:strip_speculative_padding": "token_ids",
    "vllm.v1.worker.gpu.input_batch:get_num_sampled_and_rejected": (
        "num_sampled, seq_lens, cu_num_logits, idx_mapping, prefill_len"
    ),
}
"""Parameters of functions that the plugin wraps, overrides, stands in for or calls, keyword-only ones included."""

FIELDS: Final = {
    "vllm.config.speculative:SpeculativeConfig": (
        "method model num_speculative_tokens draft_tensor_parallel_size revision code_revision target_model_config "
        "target_parallel_config draft_model_config draft_parallel_config"
    ),
    "vllm.config.model:ModelConfig": (
        "model hf_config tokenizer tokenizer_mode trust_remote_code dtype seed max_model_len enforce_eager "
        "served_model_name get_hidden_size get_vocab_size is_attention_free is_hybrid is_encoder_decoder runner_type "
        "use_mla uses_mrope enable_trace_replay rswa_window return_sampling_mask"
    ),
    "vllm.config.aux_output:AuxOutputConfig": "enabled",
    "vllm.engine.arg_utils:EngineArgs": (
        "speculative_config spec_method spec_model spec_tokens load_format disable_log_stats"
    ),
    "vllm.config.parallel:ParallelConfig": (
        "worker_cls pipeline_parallel_size tensor_parallel_size decode_context_parallel_size "
        "prefill_context_parallel_size enable_batch_sharded_sampling use_ubatching"
    ),
    "vllm.config.attention:AttentionConfig": "flash_attn_max_num_splits_for_cuda_graph",
    "vllm.config.cache:CacheConfig": "cache_dtype kv_sharing_fast_prefill",
    "vllm.config.scheduler:SchedulerConfig": "max_num_seqs max_num_batched_tokens",
    "vllm.config.vllm:VllmConfig": (
        "speculative_config model_config use_v2_model_runner kv_transfer_config cache_config parallel_config "
        "compilation_config scheduler_config uniform_decode_query_len lora_config aux_output_config"
    ),
    "vllm.distributed.parallel_state:GroupCoordinator": "rank_in_group",
    "vllm.config.compilation:CompilationConfig": (
        "mode cudagraph_mode cudagraph_capture_sizes max_cudagraph_capture_size"
    ),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len block_table_tensor "
        "slot_mapping positions is_prefilling seq_lens_cpu_upper_bound rswa_prefix_lens req_idx mm_req_doc_ranges "
        "_num_computed_tokens_cache _token_to_req_indices_cache"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": "isa block_size",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": (
        "num_kv_heads num_queries_per_kv scale sliding_window logits_soft_cap alibi_slopes sinks"
    ),
    LOGITS_PROCESSOR: "scale head_dtype",
    f"{EMBEDDING}:VocabParallelEmbedding": "shard_indices num_embeddings_per_partition tp_size quant_method",
    f"{EMBEDDING}:VocabParallelEmbeddingShardIndices": (
        "org_vocab_start_index org_vocab_end_index num_org_vocab_padding"
    ),
    f"{FLASH_ATTENTION}:FlashAttentionImpl": (
        "alibi_slopes attn_type head_size kv_cache_dtype logits_soft_cap num_kv_heads scale sinks sliding_window "
        "supports_quant_query_input vllm_flash_attn_version"
    ),
    f"{FLASH_ATTENTION}:FlashAttentionMetadataBuilder": (
        "attention_config block_size cache_config headdim kv_cache_dtype num_heads_kv num_heads_q"
    ),
    f"{TRITON_ATTENTION}:TritonAttentionImpl": (
        "alibi_slopes attn_type head_size kv_cache_dtype logits_soft_cap scale sinks sliding_window chunk_lookback"
    ),
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups",
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "total_num_scheduled_tokens scheduled_new_reqs scheduled_spec_decode_tokens"
    ),
    STRUCTURED_OUTPUT: "vllm_config _grammar_bitmask _full_mask",
    DRAFT_TOKENS_HANDLER: "draft_tokens_np num_draft_tokens",
    "vllm.v1.outputs:DraftTokenIds": "req_ids draft_token_ids",
    "vllm.v1.structured_output:ConstraintBounds": "grammar_start constraint_start",
    "vllm.v1.metrics.stats:IterationStats": "inter_token_latencies_iter",
    "vllm.v1.metrics.stats:SchedulerStats": "spec_decoding_stats",
    "vllm.v1.spec_decode.metrics:SpecDecodingStats": "num_drafts num_draft_tokens num_accepted_tokens_per_pos",
    "vllm.v1.outputs:SamplerOutput": "sampled_token_ids logprobs_tensors",
    "vllm.v1.outputs:LogprobsTensors": "logprob_token_ids logprobs selected_token_ranks",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "num_draft_tokens",
    "vllm.v1.sample.metadata:SamplingMetadata": (
        "all_greedy no_penalties max_num_logprobs generators spec_token_ids bad_words_token_ids allowed_token_ids_mask "
        "logitsprocs logprob_token_ids thinking_budget_state_holder"
    ),
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "generators req_output_token_ids block_table sampling_metadata token_ids_cpu_tensor num_tokens_no_spec"
    ),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner": (
        "input_batch requests positions input_ids seq_lens discard_request_mask drafter sampler compilation_config "
        "scheduler_config max_num_tokens dtype model vllm_config"
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (
        "req_states sampler rejection_sampler speculator draft_tokens_handler attn_groups kv_cache_config "
        "compilation_config max_num_reqs model vocab_size adaptive_verification"
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "num_reqs num_draft_tokens_per_req idx_mapping idx_mapping_np logits_indices input_ids positions seq_lens "
        "cu_num_logits cu_num_logits_np expanded_idx_mapping expanded_local_pos seq_lens_cpu_upper_bound "
        "has_structured_output_reqs"
    ),
    "vllm.v1.worker.gpu.sample.output:SamplerOutput": (
        "sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected sampling_mask_tensors"
    ),
    "vllm.v1.worker.gpu.sample.sampler:Sampler": (
        "logits_processors thinking_budget_state sampling_states req_states compute_nans logprobs_mode "
        "logprob_token_ids_state return_sampling_mask"
    ),
    "vllm.v1.worker.gpu.sample.bad_words:BadWordsState": "num_bad_words",
    "vllm.v1.worker.gpu.sample.penalties:PenaltiesState": "use_penalty",
    f"{BUDGET}:AdaptiveVerificationManager": (
        "req_states num_speculative_steps cost_tables _batch_budget _stale_confidences _stale_idx _pending_resets"
    ),
    "vllm.v1.worker.gpu.states:RequestState": (
        "max_num_reqs max_num_batched_tokens req_id_to_index prefill_len all_token_ids total_len"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor": "cg_mode num_reqs",
    "vllm.v1.worker.utils:AttentionGroup": "backend layer_names metadata_builders",
}
"""Fields and attributes that the plugin reads or writes; an attribute is one that a class or a base of it sets."""

NAMES: Final = {
    "vllm.config.vllm": "NgramGPUTypes",
    "vllm.transformers_utils.config": "_CONFIG_REGISTRY _SPECULATIVE_DECODING_CONFIGS",
    "vllm.v1.worker.gpu_model_runner": "build_logitsprocs",
    "vllm.v1.worker.gpu.model_runner": "init_speculator maybe_create_adaptive_verification_manager",
    BUDGET: "AdaptiveVerificationManager",
    "vllm.v1.attention.selector": "_cached_get_attn_backend",
    "vllm.v1.sample.logits_processor": "LogitBiasLogitsProcessor MinTokensLogitsProcessor LogitsProcessor",
    "vllm.vllm_flash_attn.flash_attn_interface": "flash_attn_varlen_func",
    "vllm.v1.attention.backends.flash_attn": "flash_attn_varlen_func get_scheduler_metadata",
    "vllm.v1.worker.cpu_worker": "CPUModelRunner",
    "vllm.v1.worker.cpu.model_runner": "CPUModelRunner",
}
"""Names of modules that the plugin replaces or reaches into."""

PATCHED: Final = {
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": "process",
    "vllm.sampling_params:SamplingParams._validate_spec_decode": "process",
    "vllm.config.vllm:NgramGPUTypes": "process",
    "vllm.config.vllm:VllmConfig._set_cudagraph_sizes": "process",
    "vllm.transformers_utils.config:_CONFIG_REGISTRY": "process",
    "vllm.transformers_utils.config:_SPECULATIVE_DECODING_CONFIGS": "process",
    "vllm.model_executor.models.registry:ModelRegistry.models": "process",
    f"{STRUCTURED_OUTPUT}.__new__": "process",
    "vllm.v1.worker.gpu_model_runner:build_logitsprocs": "runner",
    "vllm.v1.worker.gpu.model_runner:init_speculator": "runner",
    "vllm.v1.worker.gpu.model_runner:maybe_create_adaptive_verification_manager": "runner",
    f"{BUDGET}:AdaptiveVerificationManager": "runner",
    "vllm.v1.worker.cpu_worker:CPUModelRunner": "runner",
    "vllm.v1.worker.cpu.model_runner:CPUModelRunner": "runner",
    "vllm.v1.attention.backends.registry:_ATTN_OVERRIDES": "layers",
}
"""What patches change, and for how long: for the process, while a runner is constructed or makes its KV cache, or while
the target's layers are constructed."""
