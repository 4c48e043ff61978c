#!/usr/bin/env bash
# make_env.sh BASE ENV VERSION: a virtual environment ENV with verl VERSION on top of the packages of BASE.
#
# verl's own pins (torch, transformers, SGLang, flash attention, all of other versions than the SGLang that is tested)
# cannot be met beside BASE, and most of what it names it does not need for rollouts: it is installed as it is, without
# its dependencies, beside those that it does need. Takes seconds, and some 300 MB.
set -euo pipefail
base=$(cd "$1" && pwd)
env=$2
version=$3
"$base/bin/python" -m venv --without-pip --clear "$env"
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
below=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# addsitedir, and not the path alone: it reads the .pth files of BASE, by which this package is found.
echo "import site; site.addsitedir('$below')" > "$site/base.pth"
"$base/bin/python" -m pip --python "$env/bin/python" install --quiet --no-deps "verl==$version" \
    accelerate antlr4-python3-runtime==4.9.3 cachetools codetiming hydra-core msgpack omegaconf peft pylatexenc pyvers \
    ray==2.60.0 tensordict==0.10.0 torchdata
