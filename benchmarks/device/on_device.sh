#!/bin/bash
# All checks and benchmarks of one GPU within a time budget, the most valuable first. A failure does
# not stop the rest. Each stage writes a log to $OUT; the digest is printed last.
#
#   bash benchmarks/device/on_device.sh
#   STAGES="loss attention" BUDGET=200 bash benchmarks/device/on_device.sh
#   DRY=1 OUT=/tmp/dry bash benchmarks/device/on_device.sh     # tiny sizes, on a CPU
cd "$(dirname "$0")/../.." || exit 1
STAGES=${STAGES:-"machine correct meta_step loss attention train large choice horizon tests"}
OUT=${OUT:-/tmp/out}
export DRY=${DRY:-}
BUDGET=${BUDGET:-$([ -z "$DRY" ] && echo 510 || echo 3600)} # seconds
export WORK=${TMPDIR:-/tmp}/datarater_device
PY=${PY:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SITE=${SITE:-$WORK/site}
export PY PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_COMPILE_THREADS=1 # its pool of compilers keeps a finished process waiting
mkdir -p "$OUT" "$SITE/xprof/cli/tools"
rm -f "$OUT/digest.txt" $(printf "$OUT/%s.log " $STAGES)
SECONDS=0

if [ -n "$DRY" ]; then
  export JAX_PLATFORMS=cpu
else
  # cuBLAS alone: XLA would compile hundreds of Triton matmuls to choose from. FAST= shows their worth.
  export XLA_FLAGS="$XLA_FLAGS ${FAST---xla_gpu_enable_triton_gemm=false}"
  "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SITE" .gpu/wheels/*.whl 2>&1 | tail -3
fi
# Tokamax imports this module, which none of its losses use.
touch "$SITE/xprof/__init__.py" "$SITE/xprof/cli/__init__.py"
echo "get_kernel_stats_tool = None" > "$SITE/xprof/cli/tools/__init__.py"
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
# All stages share compiled programs and autotuning results.
export JAX_COMPILATION_CACHE_DIR=$WORK/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1

step() { # step LIMIT LOG COMMAND...: runs it within its limit and the budget, into the log
  local limit=$1 log=$OUT/$2.log left=$((BUDGET - SECONDS)) began=$SECONDS said=ok status
  shift 2
  [ -z "$DRY" ] || limit=$((10 * limit))
  if [ $left -lt 15 ]; then
    echo "[$SECONDS s] SKIPPED, no time left: $*" | tee -a "$OUT/digest.txt"
    return
  fi
  [ "$limit" -le $left ] || limit=$left
  echo "\$ $*" >> "$log"
  # KILL ends a script's children too: train.py waits for its step at TERM, and holds the GPU.
  timeout -s KILL "$limit" "$@" >> "$log" 2>&1
  status=$?
  [ $status -eq 0 ] || said="FAILED with $status"
  [ $status -ne 137 ] || said="TIMED OUT after $limit s"
  echo "[$SECONDS s] $said ($((SECONDS - began)) s): $*" | tee -a "$log" "$OUT/digest.txt"
}
module() { # module LIMIT LOG MODULE FLAGS...
  local limit=$1 log=$2 name=$3
  shift 3
  step "$limit" "$log" "$PY" -m "benchmarks.$name" "$@"
}
probe() { # probe LIMIT MODEL FLAGS...: a meta-step of one inner model and a 50m rater
  local limit=$1 model=$2
  shift 2
  local size="--model=$model --rater=50m --dtype=bfloat16 --vocab=32000 --seq=2048"
  [ -z "$DRY" ] || size="--model=nano --batch=2 --seq=64 --vocab=300 --repeats=2"
  module "$limit" meta_step meta_step --T=2 --mode=mixed $size "$@"
}

machine() { # versions and ceilings
  [ -n "$DRY" ] || step 20 machine nvidia-smi
  module 40 machine device.machine ${DRY:+--dry}
}
correct() { # the kernels at real tiles and sizes against float32 matmuls
  # Nothing is timed, so XLA need not try out its own matmuls.
  local XLA_FLAGS="$XLA_FLAGS --xla_gpu_autotune_level=0"
  module 60 correct device.correct loss ${DRY:+--dry}
  module 150 correct device.correct attention ${DRY:+--dry}
}
meta_step() { # time, memory, utilization, and the kernels that take the time
  local kernels="--loss_backend=pallas_gpu --attention_backend=pallas_gpu"
  probe 100 150m --remat=block $kernels --profile
  probe 50 150m --remat=none $kernels
  probe 45 150m --remat=block --attention_backend=pallas_gpu
}
loss() { # the loss against dense, and other libraries on equal data
  local size=16384x1280x32000 big=16384x1280x256000
  [ -z "$DRY" ] || size=64x64x512 big=64x64x600
  module 40 loss device.peers --group=jax --size=$size
  module 40 loss device.peers --group=torch --size=$size
  module 60 loss loss --sizes=$size --repeats=5
  module 40 loss loss --sizes=$big --repeats=3 --backends=pallas_gpu,xla
  module 25 loss device.peers --group=torch --size=$big
}
attention() { # attention, cuDNN's, and JAX's Mosaic GPU examples
  local small=${DRY:+--heads=2x16 --seq=32}
  module 40 attention attention --backends=pallas_gpu $small
  module 35 attention device.flash ${DRY:+--dry}
  module 70 attention attention --backends=xla ${small:---heads=12x64}
}
train() { # train.py learns, stops and resumes
  step 150 train bash benchmarks/device/train_resume.sh
}
large() { # the 400m model: does it fit, is the planner right
  probe 80 400m --remat=block --repeats=3 --loss_backend=pallas_gpu --attention_backend=pallas_gpu
}
choice() { # which backend is fastest at which shape
  local sizes=1024x256x258,16384x768x8192,16384x1280x64000,16384x1280x128000
  [ -z "$DRY" ] || sizes=64x64x512
  module 100 choice loss --sizes=$sizes --repeats=3 --backends=pallas_gpu,xla
  local shape
  for shape in "--seq=128 --batch=32" "--seq=512 --batch=16" "--seq=8192 --batch=2"; do
    [ -z "$DRY" ] || shape="--seq=32 --batch=1"
    module 60 choice attention --backends=pallas_gpu,xla --heads=12x64 --repeats=3 $shape
  done
}
horizon() { # the gradient of a run of 100 steps: what replaying costs
  local size="--model=150m --batch=2 --T=100"
  [ -z "$DRY" ] || size="--T=4"
  module 270 horizon horizon $size --repeats=1
}
tests() { # the kernels' unit tests; eight processes share the GPU, so none preallocates
  local how="-n 8"
  [ -z "$DRY" ] || how=--collect-only
  JAX_DEFAULT_MATMUL_PRECISION=float32 XLA_PYTHON_CLIENT_PREALLOCATE=false \
    step 75 tests "$PY" -m pytest --maxfail=20 -p no:cacheprovider $how tests/kernels \
    -k "pallas_gpu and not any_shape and not reverse_over"
}

for stage in $STAGES; do
  echo "== $stage at $SECONDS s"
  "$stage"
done
echo "== digest"
figures="^(RESULT|CHECK|CEILING|PEER|T=|[0-9]+x[0-9x]+ |[NH] x| +[0-9]+ +[0-9] )|, jax [0-9]| (passed|failed)"
grep -hE "$figures" "$OUT"/*.log | tee -a "$OUT/digest.txt"
exit 0
