# SPDX-License-Identifier: Apache-2.0
"""A vLLM batch engine that obeys JSON lines (runs in the engines' Python, under `valve run`).

`{"do": "generate", "prompts": [TEXT...], "tokens": N}` answers {"tokens": [[...]...], "seconds": S};
`{"do": "reset"}` forgets the prefix cache. Answers go where standard output was; what vLLM prints goes to
standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=512)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=arguments.model, dtype="float32", enforce_eager=True, block_size=32, seed=0,
        max_model_len=arguments.max_model_len, max_num_seqs=32,
        enable_prefix_caching=arguments.prefix_caching,
    )  # fmt: skip
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "reset":
            print(json.dumps({"reset": bool(llm.reset_prefix_cache())}), file=answers, flush=True)
            continue
        sampling = SamplingParams(temperature=0, max_tokens=command["tokens"], ignore_eos=True)
        started = time.monotonic()
        outputs = llm.generate(command["prompts"], sampling, use_tqdm=False)
        answer = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "seconds": time.monotonic() - started,
        }
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":  # vLLM starts children that import this file
    sys.exit(main())
