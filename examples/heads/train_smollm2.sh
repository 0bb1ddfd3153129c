#!/usr/bin/env bash
# Make the heads in examples/heads anew, from the repository's root: fetch the model, let it write its training set and
# a held-out one, train plain and sequential heads on the same text, keep both in bf16, and calibrate them. The same
# command goes on after an interruption.
#
#     bash examples/heads/train_smollm2.sh [PROMPTS]    # default 1000: about four hours on 2 CPU cores without bf16
set -euo pipefail
prompts=${1:-1000}
work=build/train_smollm2
export PATH="$PWD/.venv/bin:$PATH" LD_PRELOAD="${LD_PRELOAD:-$PWD/.venv/lib/libiomp5.so}"
export VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1

write() {
    vllm-medusa distill --self-prompts "$1" --seed "$2" --prompt-temperature 0.8 --prompt-top-p 1.0 --model build/smollm2 \
        --output "$3" --max-tokens 512 --shard-size 256 --engine-args '{"dtype": "float32", "max_model_len": 2048,
        "max_num_seqs": 128, "kv_cache_memory_bytes": 2147483648, "enforce_eager": true}'
}

train() {
    local name=$1
    shift
    vllm-medusa train --target build/smollm2 --data "$work/data" --held-out "$work/held_out" --output "$work/$name" \
        --dtype float32 --block-length 512 --batch-size 4 --epochs 1.5 --learning-rate 2e-3 --shared-lm-head \
        --draft-vocab 4096 --heads-loss kl --cache-hidden --cache-directory "$work/hidden" "$@"
}

keep() {
    rm -rf "examples/heads/$2"
    python examples/heads/in_bf16.py "$work/$1/heads" "examples/heads/$2"
    vllm-medusa eval --model build/smollm2 --heads "examples/heads/$2" --data "$work/held_out" --dtype float32 --max-length 512 --write
}

vllm-medusa fetch-demo
write "$prompts" 0 "$work/data"
write 24 1 "$work/held_out"
train plain
train sequential --path-rank 256
keep plain smollm2-135m-instruct
keep sequential smollm2-135m-instruct-sequential
