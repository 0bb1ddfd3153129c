#!/usr/bin/env bash
# Make the heads in examples/heads/smollm2-135m-instruct anew, from the repository's root: fetch the model, let it write
# its training set, train, and keep the heads in bf16. The same command goes on after an interruption.
#
#     bash examples/heads/train_smollm2.sh [PROMPTS]    # default 256: about two hours on 2 CPU cores without bf16
set -euo pipefail
prompts=${1:-256}
work=build/train_smollm2
export PATH="$PWD/.venv/bin:$PATH" LD_PRELOAD="${LD_PRELOAD:-$PWD/.venv/lib/libiomp5.so}"
export VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1

vllm-medusa fetch-demo
vllm-medusa distill --self-prompts "$prompts" --seed 0 --model build/smollm2 --output "$work/data" --max-tokens 512 \
    --shard-size 256 --engine-args '{"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 128,
    "kv_cache_memory_bytes": 2147483648, "enforce_eager": true}'
vllm-medusa train --target build/smollm2 --data "$work/data" --output "$work/run" --dtype float32 --block-length 512 \
    --batch-size 4 --epochs 2.5 --learning-rate 2e-3 --shared-lm-head --draft-vocab 12288 --cache-hidden --heads-loss kl
python examples/heads/in_bf16.py "$work/run/heads" examples/heads/smollm2-135m-instruct
