#!/bin/bash
# Fills .gpu/ (ignored by git) with all that a GPU machine without a package index lacks: wheels for
# Python 3.12 beside its own JAX 0.11.2 and PyTorch 2.11, and a part of the demo corpus. Take it
# along with the working tree. Run this where packages can be fetched.
cd "$(dirname "$0")/../.." || exit 1
PY=${PY:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
rm -rf .gpu && mkdir -p .gpu/wheels .gpu/corpus

project="dm-haiku==0.0.17 jmp==0.0.4 grain==0.2.18 array-record==0.8.6 portpicker==1.6.0"
peers="liger-kernel==0.8.5 cut-cross-entropy==25.1.1 tokamax==0.0.17"
tokamax_needs="einshape==1.0 qwix==0.1.8 immutabledict==4.3.1 tensorboardx==2.6.5 pydantic==2.14.4
  pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5"
platforms=$(printf -- ' --platform manylinux%s_x86_64' _2_28 _2_27 _2_24 _2_17 2014 1)
missing=
for wheel in $project $peers $tokamax_needs; do
  "$PY" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    $platforms -d .gpu/wheels "$wheel" || missing="$missing $wheel"
done
[ -z "$missing" ] || echo "NOT FETCHED:$missing (the stages that need them say so)"

"$PY" -m corpus.demo --output=.cache/demo_corpus.jsonl
# A third is enough for the stage `train`. SOURCES.md says that the corpus is complete.
awk 'NR % 3 == 1' .cache/demo_corpus.jsonl > .gpu/corpus/demo_corpus.jsonl
cp .cache/SOURCES.md .gpu/corpus/
du -sh .gpu
echo "next, on the GPU machine: bash benchmarks/device/on_device.sh"
