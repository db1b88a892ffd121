# train.py as a user runs it: it is stopped after its first checkpoint, resumes, and ends with a
# report. Called by on_device.sh, which sets PY, WORK and DRY (tiny sizes, on a CPU).
corpus=.cache/demo_corpus.jsonl; run=$WORK/run
rm -rf "$run" && mkdir -p .cache
[ -e $corpus ] || cp .gpu/corpus/* .cache/

flags="--preset=50m --workdir=$run --cache_dir=$WORK/tokens --data=demo --tokenizer=bytes
  --packing=document --sequence_length=512 --validation_fraction=0.1 --outer_fraction=0.2
  --report_documents=400 --n_models=2 --inner_batch=32 --outer_batch=32 --rater=small --remat=block
  --lifetime=200 --inner_warmup=10 --meta_learning_rate=1e-3 --meta_warmup=10 --meta_steps=60
  --steps_per_call=10 --checkpoint_every=20 --loss_backend=pallas_gpu --attention_backend=pallas_gpu"
[ -z "$DRY" ] || flags="$flags --model=nano --rater=nano --sequence_length=64 --inner_batch=4
  --outer_batch=4 --report_documents=40 --loss_backend=xla --attention_backend=xla --meta_steps=40
  --steps_per_call=2 --checkpoint_every=2 --dtype=float32 --max_documents=2000"

has_checkpoint() { ls "$run"/checkpoints/*/ > /dev/null 2>&1; }
began=$SECONDS
"$PY" train.py $flags > "$WORK/first.log" 2>&1 &
process=$!
while ! has_checkpoint && kill -0 $process 2> /dev/null; do sleep 0.2; done
kill -TERM $process 2> /dev/null
wait $process
echo "RESULT train: first part ended with $? after $((SECONDS - began)) s"
tail -c 1500 "$WORK/first.log"
"$PY" train.py $flags
echo "RESULT train: second part ended with $? after $((SECONDS - began)) s in all"
"$PY" - "$run/metrics.jsonl" <<'P'
import json, statistics, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
mean = lambda x: statistics.fmean(x if isinstance(x, list) else [x])
some = rows[:: max(1, len(rows) // 8)]
print("RESULT train: every step is there:", [r["step"] for r in rows] == [*range(1, len(rows) + 1)])
for name in ("outer_loss", "score_std"):
  print(f"RESULT train: {name}", *(f"{mean(r[name]):.3f}" for r in some))
print("RESULT train: skipped", sum(mean(r["skipped"]) for r in rows))
P
head -20 "$run/summary.txt"
