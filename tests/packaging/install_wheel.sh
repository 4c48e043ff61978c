#!/usr/bin/env bash
# install_wheel.sh WHEEL BASE: installs a wheel into a fresh environment and runs one integration test from it.
#
# BASE is an environment that has SGLang, torch and pytest. The fresh environment sees BASE's packages by a line in a
# .pth file, so SGLang's 9 GB are not installed again. A plain path does not read the .pth files of BASE: by those the
# source tree would be found, and the test would not run what the wheel has. Takes a minute, and some 30 MB.
set -euo pipefail
wheel=$(realpath "$1")
base=$(cd "$2" && pwd)
tree=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$base/bin/python" -m venv --without-pip "$work/env"
python=$work/env/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -m pip --python "$python" install --quiet --no-deps --no-index "$wheel"
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/base.pth"

# The test and what it reads, without the package.
mkdir "$work/tree"
cp -r "$tree/tests" "$tree/benchmarks" "$tree/docs" "$tree/README.md" "$tree/pyproject.toml" "$work/tree"
cd "$work/tree"
unset PYTHONPATH
"$python" - "$site" <<'CHECK'
import sys
from importlib.metadata import entry_points
from pathlib import Path

import spmd_engine
from spmd_engine.transfer import _native

for file in (spmd_engine.__file__, _native._C.__file__):
    assert Path(file).is_relative_to(sys.argv[1]), f"{file} is not what the wheel installed"
(plugin,) = {entry.value for entry in entry_points(group="sglang.srt.platforms") if entry.name == "spmd_engine"}
print(f"{spmd_engine.__version__} in {Path(spmd_engine.__file__).parent}, platform plug-in {plugin}")
CHECK
"$work/env/bin/spmd-engine" --help > /dev/null
"$python" -m pytest -p no:cacheprovider --basetemp "$work/pytest" tests/integration/test_docs.py
