# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching that obeys JSON lines: as vllm_offline.py, and starts in seconds.

It shows what a program must do to be a tenant: one call of `install()`, which does nothing elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prefix-caching", action="store_true")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    from valve_runtime import transformers_cb

    tenant = transformers_cb.install()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    batching = ContinuousBatchingConfig(
        page_size=32, max_batch_tokens=512, num_blocks=128, allow_block_sharing=arguments.prefix_caching
    )

    def new_manager() -> Any:
        made = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=copy.deepcopy(batching),
        )
        made.warmup()
        made.batch_processor.cache.reset()  # so ends a warm-up where it does something, on a GPU
        made.start()
        return made

    manager = new_manager()
    print(json.dumps({"ready": True, "tenant": tenant}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("new_manager"):
            manager.stop(block=True)
            manager = new_manager()
        started = time.monotonic()
        found: dict[str, list[int]] = {}
        ids = [
            manager.add_request(tokenizer(text)["input_ids"], max_new_tokens=command["tokens"])
            for text in command["prompts"]
        ]
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                found[result.request_id] = list(result.generated_tokens)
            elif not manager.is_running():
                raise RuntimeError("the generation thread ended")
        answer = {"tokens": [found[i] for i in ids], "seconds": time.monotonic() - started}
        print(json.dumps(answer), file=answers, flush=True)
    manager.stop(block=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
