"""A job as it was written for SGLang's former VerlEngine, with one line changed: the import."""

from __future__ import annotations

from typing import Any

import models
import pytest

from integration.scenarios.common import GREEDY, PROMPTS, shard
from spmd_engine import VerlEngine, errors


def job(context: Any, name: str, path: str) -> dict[str, Any]:
    mesh, model = context.mesh(context.world), shard(models.make_model(name, seed=2), context.world)
    kwargs = {"dtype": "bfloat16", "mem_fraction_static": 0.5, "enable_memory_saver": True, "load_format": "dummy"}
    places = {"base_gpu_id": 0, "gpu_id_step": 1, "dist_init_addr": None, "port": 30000}
    with pytest.raises(errors.ConfigError, match='use backend="engine"'):
        VerlEngine(mesh, 1, "server", model_path=path)
    engine = VerlEngine(
        model_path=path, device_mesh_cpu=mesh, nnodes=1, backend="engine", max_total_tokens=4096, **kwargs, **places
    )
    try:
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        engine.update_weights_from_tensor([(n, p) for n, p in model.state_dict().items()], load_format=None)
        nothing = [None] * len(PROMPTS)
        outputs = engine.generate(None, GREEDY, PROMPTS, nothing, True)
        engine.flush_cache()
        again = engine.generate(prompt=None, sampling_params=GREEDY, input_ids=PROMPTS, return_logprob=True)
        assert [o["output_ids"] for o in again] == [o["output_ids"] for o in outputs]
        for output in outputs:
            assert [entry[1] for entry in output["meta_info"]["output_token_logprobs"]] == output["output_ids"]
        with pytest.raises(errors.InvalidRequestError, match="image_data= is not supported"):
            engine.generate(None, GREEDY, PROMPTS, [b"", b"", b""])
        with pytest.raises(errors.InvalidRequestError, match="load_format='direct'"):
            engine.update_weights_from_tensor([], load_format="direct")
        return {"tokens": [o["output_ids"] for o in outputs], "checksums": engine.weight_checksums()}
    finally:
        engine.shutdown()
