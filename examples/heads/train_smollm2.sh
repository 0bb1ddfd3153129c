#!/usr/bin/env bash
# Make the heads in examples/heads anew, from the repository's root: fetch the model, let it write prompts and answer
# them, train plain and sequential heads on the same text, go on with answers to prompts of many kinds, keep both in
# bf16, and calibrate them. The same command goes on after an interruption.
#
#     bash examples/heads/train_smollm2.sh [OWN] [MIXED]   # prompts; default 1000 and 2784: six hours on 2 CPU cores without bf16
set -euo pipefail
own=${1:-1000} mixed=${2:-2784}
work=build/train_smollm2
export PATH="$PWD/.venv/bin:$PATH" LD_PRELOAD="${LD_PRELOAD:-$PWD/.venv/lib/libiomp5.so}"
export VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1

write() {
    local output=$1
    shift
    vllm-medusa distill --model build/smollm2 --output "$output" --engine-args '{"dtype": "float32",
        "max_model_len": 2048, "max_num_seqs": 128, "kv_cache_memory_bytes": 2147483648, "enforce_eager": true}' "$@"
}

train() {
    local name=$1 data=$2
    shift 2
    vllm-medusa train --target build/smollm2 --data "$data" --held-out "$work/held_out.jsonl" --output "$work/$name" \
        --dtype float32 --block-length 512 --shared-lm-head --heads-loss kl --cache-hidden --cache-directory "$data-hidden" "$@"
}

both() {
    local name=$1
    shift
    train "$name" "$work/own" --draft-vocab 4096 --batch-size 4 --epochs 1.5 --learning-rate 2e-3 "$@"
    train "$name-more" "$work/mixed" --initial-heads "$work/$name/heads" --draft-vocab 2048 --batch-size 1 --epochs 2 \
        --learning-rate 2e-3 --optimizer muon --labels all "$@"
}

keep() {
    rm -rf "examples/heads/$2"
    python examples/heads/in_bf16.py "$work/$1/heads" "examples/heads/$2"
    vllm-medusa eval --model build/smollm2 --heads "examples/heads/$2" --data "$work/held_out.jsonl" --dtype float32 --max-length 512 --write
}

vllm-medusa fetch-demo
write "$work/own" --self-prompts "$own" --prompt-temperature 0.8 --prompt-top-p 1.0 --max-tokens 512 --shard-size 256
python examples/heads/prompts.py "$mixed" 21 "$work/mixed.jsonl" "$work"/own/prompts/*.jsonl
head -n -64 "$work/mixed.jsonl" > "$work/learnt.jsonl"
tail -n 64 "$work/mixed.jsonl" > "$work/judged.jsonl"
write "$work/mixed" "$work/learnt.jsonl" --max-tokens 160 --shard-size 160
write "$work/judged" "$work/judged.jsonl" --max-tokens 160
cp "$work/judged/shard-00000.jsonl" "$work/held_out.jsonl"
both plain
both sequential --path-rank 256
keep plain-more smollm2-135m-instruct
keep sequential-more smollm2-135m-instruct-sequential
