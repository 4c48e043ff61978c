"""The calls of `scenarios.generate.text` on SGLang's own engine: `stock_engine.py MODEL OUTPUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import sglang

    from integration.scenarios.generate import text_outputs

    engine = sglang.Engine(
        model_path=sys.argv[1],
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="llguidance",
        max_total_tokens=65536,
        random_seed=7,
        log_level="warning",
    )
    try:
        Path(sys.argv[2]).write_text(json.dumps(text_outputs(engine)))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
