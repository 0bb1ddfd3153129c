# SPDX-License-Identifier: Apache-2.0
"""Ask and stream through ``vllm serve`` with the official OpenAI client.

Start a server first; TARGET and HEADS may be those of ``make demo``, build/smollm2 and
examples/heads/smollm2-135m-instruct:

    vllm serve TARGET --max-model-len 1024 --speculative-config '{"method": "medusa", "model": "HEADS"}'
    python examples/openai_client.py http://localhost:8000/v1
"""

import sys

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url=sys.argv[1], api_key="none")
    model = client.models.list().data[0].id
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = client.chat.completions.create(model=model, messages=[question], max_tokens=64, temperature=0)
    print(answer.choices[0].message.content)
    print("--- streamed")
    question = {"role": "user", "content": "Give three reasons to learn a language."}
    stream = client.chat.completions.create(model=model, messages=[question], max_tokens=64, temperature=0, stream=True)
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
