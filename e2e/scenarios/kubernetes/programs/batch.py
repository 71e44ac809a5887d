# SPDX-License-Identifier: Apache-2.0
"""An offline batch job: transformers' continuous batching over the same prompts, round after round.

    batch.py --model FOLDER [--rounds N]

Prints a JSON line when it can begin and one after every round: the tokens, which must be the same every time,
whatever was taken from it meanwhile. `valve_runtime` is there because Valve put it there; without Valve the
program runs just so. Single-threaded but for transformers' own thread. Runs in the engines' environment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time

SUBJECTS = ("rivers", "iron", "bread", "the moon", "a dog", "winter", "trains", "glass")
PROMPT = "You are a careful assistant. You answer in complete sentences and explain every step. " * 4
TOKENS = 48


def install() -> bool:
    """True when this process is a tenant of Valve."""
    try:
        from valve_runtime import transformers_cb
    except ModuleNotFoundError:
        return False
    return bool(transformers_cb.install())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=0, help="0: until it is ended")
    arguments = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    tenant = install()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=32, max_batch_tokens=512, num_blocks=512
        ),
    )
    manager.start()
    print(json.dumps({"tenant": tenant}), flush=True)
    rounds = range(arguments.rounds) if arguments.rounds else itertools.count()
    for number in rounds:
        started, found = time.monotonic(), dict[str, list[int]]()
        ids = [
            manager.add_request(
                tokenizer(f"{PROMPT}Tell me about {subject}.")["input_ids"], max_new_tokens=TOKENS
            )
            for subject in SUBJECTS
        ]
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                found[result.request_id] = list(result.generated_tokens)
            elif not manager.is_running():
                raise RuntimeError("the generation thread ended")
        line = {"round": number, "seconds": time.monotonic() - started, "tokens": [found[i] for i in ids]}
        print(json.dumps(line), flush=True)
    manager.stop(block=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
