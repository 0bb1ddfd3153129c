#!/usr/bin/env bash
# From a model without heads to a served draft tree: distill, train, evaluate, serve.
#
#     make demo                                    # once: it trains the small model that this walk starts from
#     bash examples/walk.sh build/demo/target-*    # minutes on 2 CPU cores
#
# The same commands serve a model of any size; examples/train_7b.yaml has settings for one of 7 billion parameters.
set -euo pipefail
target=$1
walk=${2:-build/walk}
export PATH="$PWD/.venv/bin:$PATH" LD_PRELOAD="${LD_PRELOAD:-$PWD/.venv/lib/libiomp5.so}"
export VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1

echo "--- prompts: beginnings of Python modules"
python examples/standard_library_text.py "$target" "$walk"

echo "--- distill: the target goes on from them, and so writes its heads' training set"
vllm-medusa distill "$walk/prompts.jsonl" --model "$target" --output "$walk/data" --max-tokens 160 --temperature 0 \
    --shard-size 256 \
    --engine-args '{"dtype": "float32", "enforce_eager": true, "max_model_len": 512, "kv_cache_memory_bytes": 268435456}'

echo "--- train: four heads learn what the target will say next"
vllm-medusa train --target "$target" --data "$walk/data" --output "$walk/run" --block-length 192 --batch-size 8 \
    --steps 200 --learning-rate 3e-3

echo "--- eval: how often they are right on other prompts, and which tree that makes best"
vllm-medusa eval --model "$target" --heads "$walk/run/heads" --prompts "$walk/held_out.jsonl" --write --nodes 7 \
    --output "$walk/eval.json" --plot "$walk/eval.png"

echo "--- serve"
python examples/offline.py "$target" "$walk/run/heads"
