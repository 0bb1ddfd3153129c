# SPDX-License-Identifier: Apache-2.0
"""Complete and stream through ``vllm serve`` with the official OpenAI client.

Start a server first; with the models of ``make demo``, on 2 CPU cores, it answers in seconds:

    vllm serve TARGET --max-model-len 1024 --speculative-config '{"method": "medusa", "model": "HEADS"}'
    python examples/openai_client.py http://localhost:8000/v1
"""

import sys

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url=sys.argv[1], api_key="none")
    model = client.models.list().data[0].id
    completion = client.completions.create(model=model, prompt="import os\n\ndef ", max_tokens=64, temperature=0)
    print(completion.choices[0].text)
    print("--- streamed")
    stream = client.completions.create(model=model, prompt="class Queue:\n", max_tokens=64, temperature=0, stream=True)
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
