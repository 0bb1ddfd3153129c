#!/usr/bin/env bash
# From a chat model without heads to a served draft tree: fetch, distill, train, evaluate, serve.
#
#     bash examples/walk.sh    # minutes on 2 CPU cores
#
# It uses little text and few steps, so its heads are poor; the last line says how far more goes. The same commands
# serve a model of any size; examples/train_7b.yaml has settings for one of 7 billion parameters.
set -euo pipefail
walk=${1:-build/walk}
target=build/smollm2
shipped=examples/heads/smollm2-135m-instruct
export PATH="$PWD/.venv/bin:$PATH" LD_PRELOAD="${LD_PRELOAD:-$PWD/.venv/lib/libiomp5.so}"
export VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" HF_HUB_OFFLINE=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0  # An engine in the command's own process starts faster.
# On CPUs without bf16 instructions, bf16 is several times slower than fp32.
engine='{"dtype": "float32", "enforce_eager": true, "max_model_len": 512, "kv_cache_memory_bytes": 1073741824}'

echo "--- fetch: a small chat model, once"
vllm-medusa fetch-demo --output "$target"

echo "--- distill: the target writes prompts and answers them, which is its heads' training set"
vllm-medusa distill --self-prompts 96 --prompt-max-tokens 64 --max-tokens 128 --model "$target" \
    --output "$walk/data" --engine-args "$engine"
vllm-medusa distill --self-prompts 16 --prompt-max-tokens 64 --max-tokens 128 --model "$target" --seed 1 \
    --output "$walk/held_out" --engine-args "$engine"

echo "--- train: four heads learn what the target will say next"
vllm-medusa train --target "$target" --data "$walk/data" --output "$walk/run" --dtype float32 \
    --cache-hidden --draft-vocab 4096 --shared-lm-head --block-length 256 --batch-size 4 --steps 40 --learning-rate 2e-3

echo "--- eval: how often they are right on other text, and which tree that makes best"
vllm-medusa eval --model "$target" --heads "$walk/run/heads" --data "$walk/held_out" --dtype float32 --write --nodes 7 \
    --output "$walk/eval.json" --plot "$walk/eval.png"

echo "--- serve"
python examples/offline.py "$target" "$walk/run/heads" float32

if [ -d "$shipped" ]; then
    echo "--- what more gives: $shipped learnt from far more of such text; on the same held-out text"
    vllm-medusa eval --model "$target" --heads "$shipped" --data "$walk/held_out" --dtype float32 \
        --output "$walk/eval_shipped.json"
fi
echo "--- more text: --self-prompts 9000 --max-tokens 512 (hours on 2 cores), then train --epochs 3 --draft-vocab 2048"
