"""SGLang's own engine: `reference.py '{"model": …, "prompts": …, "new_tokens": …, "dtype": …}'` prints the tokens."""

from __future__ import annotations

import json
import sys


def main() -> None:
    import sglang

    given = json.loads(sys.argv[1])
    engine = sglang.Engine(
        model_path=given["model"],
        device="cpu",
        dtype=given["dtype"],
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        max_total_tokens=4096,
        log_level="warning",
    )
    try:
        params = {"temperature": 0.0, "max_new_tokens": given["new_tokens"]}
        outputs = engine.generate(input_ids=given["prompts"], sampling_params=params)
        print(json.dumps([output["output_ids"] for output in outputs]))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
