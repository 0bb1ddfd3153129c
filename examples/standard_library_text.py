# SPDX-License-Identifier: Apache-2.0
"""Write text and prompts out of Python's standard library: data for the other examples and for benchmarks/training.py.

    python examples/standard_library_text.py TARGET DIRECTORY

TARGET is the small model of ``make demo``. Three files: ``raw.jsonl``, modules of the library as they are;
``prompts.jsonl`` and ``held_out.jsonl``, beginnings that a model can go on from, of other modules in the last. It takes
seconds.
"""

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from vllm_medusa.demo.corpus import load_corpus
from vllm_medusa.demo.tokenizer import cut_prompts, encode_documents

CHARACTERS = 4_000_000
PROMPTS, HELD_OUT, PROMPT_TOKENS = 768, 64, 32


def main() -> None:
    target, directory = sys.argv[1], Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    corpus = load_corpus(CHARACTERS)

    def prompts(texts: tuple[str, ...], count: int) -> list[dict[str, str]]:
        cut = cut_prompts(encode_documents(tokenizer, texts), [PROMPT_TOKENS], count)
        return [{"prompt": tokenizer.decode(prompt, skip_special_tokens=True)} for prompt in cut]

    records = {
        "raw.jsonl": [{"text": text} for text in corpus.training],
        "prompts.jsonl": prompts(corpus.training, PROMPTS),
        "held_out.jsonl": prompts(corpus.held_out, HELD_OUT),
    }
    for name, lines in records.items():
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{directory / name}: {len(lines)} records")


if __name__ == "__main__":
    main()
