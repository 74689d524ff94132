#!/usr/bin/env bash
# Speech recognition in five languages, from nothing to a table of error rates, on a CPU, in about 15 minutes.
#
#   bash recipes/prompts5/run.sh                          the whole story
#   bash recipes/prompts5/run.sh --trainer.max_epochs 2   a short one; all arguments go to `mole-asr fit`
#   FILE=talk.m4a bash recipes/prompts5/run.sh            and transcribe your own recording at the end
#
# Give the same command again after an interruption: what is done stays done, and the training goes on where it stopped.
#
# OUT     where the run goes (runs/prompts5)
# DATA    where the corpus goes (data/prompts5)
# SOURCE  a folder with the ten Debian packages of the corpus, where apt cannot fetch them
# FILE    a recording to transcribe at the end (one of the test prompts)
set -eu -o pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
OUT=${OUT:-$root/runs/prompts5}
DATA=${DATA:-$root/data/prompts5}
PATH=$root/.venv/bin:$PATH # what `make` has set up, if it has
config=$root/conf/asr/prompts5.yaml
model=$OUT/model/model.safetensors
checkpoint=$OUT/checkpoints/last.ckpt

if [ -n "${FILE:-}" ] && ! [ -e "$FILE" ]; then # better told now than after the training
    echo "FILE=$FILE: no such file" >&2
    exit 1
fi

say() { printf '\n== %s\n' "$*"; }

# is_new OUTPUT INPUT...: is the output there, and no older than any of its inputs?
is_new() {
    local output=$1 input
    shift
    [ -e "$output" ] || return 1
    for input in "$@"; do
        if [ "$input" -nt "$output" ]; then return 1; fi
    done
}

# model_arguments ARGUMENT...: those that change the model, a line each. With more epochs a training goes on.
model_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --trainer.*=*) shift ;;
            --trainer.*) shift 2 || shift ;;
            *) echo "$1" && shift ;;
        esac
    done
}

mkdir -p "$OUT"
# No training goes on with another configuration than it began with.
used=$(grep -v '^ *#' "$config"; model_arguments "$@")
if [ "$(cat "$OUT/config.used" 2>/dev/null)" != "$used" ]; then
    if [ -e "$OUT/config.used" ] && [ -e "$checkpoint" ]; then
        echo "$OUT was trained with another configuration: give another OUT, or remove $OUT/checkpoints" >&2
        exit 1
    fi
    echo "$used" >"$OUT/config.used"
fi

# bash counts the seconds; those of earlier, interrupted runs are added.
SECONDS=$(cat "$OUT/seconds" 2>/dev/null || echo 0)
trap 'echo "$SECONDS" >"$OUT/seconds"' EXIT

# The arguments of `fit` are an input of the training: with other ones it goes on. (A file can be compared by its age.)
if ! [ -e "$OUT/arguments" ] || [ "$(cat "$OUT/arguments")" != "$*" ]; then
    echo "$*" >"$OUT/arguments"
fi

# 1. Real speech: voice prompts of a telephone exchange, one professional speaker a language, free licences. The verb
#    fetches and checks the packages, decodes them, and writes three manifests: cuts_train, cuts_dev, cuts_test.
say "1/5 prepare: $DATA"
mole-asr prepare prompts "$DATA" ${SOURCE:+--source "$SOURCE"}

# 2. A text tokenizer: the units that the model spells with. Two thousand sentences are too few to learn longer pieces
#    than characters.
tokenizer=$DATA/tokenizer/tokenizer.model
if ! is_new "$tokenizer" "$DATA/cuts_train.jsonl"; then
    say "2/5 tokenizer train: $tokenizer"
    mole-asr tokenizer train "$DATA/cuts_train.jsonl" "$DATA/tokenizer" --model-type char --byte-fallback false
fi

# 3. The training, nearly all of the time. Checkpoints and logs go to $OUT, the finished model to $OUT/model.
is_trained() {
    is_new "$model" "$tokenizer" "$DATA/cuts_train.jsonl" "$DATA/cuts_dev.jsonl" "$OUT/config.used" "$OUT/arguments"
}
if ! is_trained; then
    say "3/5 fit: $OUT"
    if [ -e "$model" ] && ! [ -e "$checkpoint" ]; then SECONDS=0; fi # a finished run is trained anew
    mole-asr fit --config "$config" --output "$OUT" --data.train_manifest "$DATA/cuts_train.jsonl" \
        --data.valid_manifest "$DATA/cuts_dev.jsonl" --data.tokenizer "$DATA/tokenizer" "$@" ||
        is_trained # an utterance that had to be skipped is no reason to stop: it has been named
fi

# 4. The test split, whose prompts the model has heard in no language. It has to find the language by itself.
hypothesis=$OUT/transcripts/cuts_test.jsonl
if ! is_new "$hypothesis" "$model" "$DATA/cuts_test.jsonl"; then
    say "4/5 transcribe: $hypothesis"
    rm -f "$hypothesis"
    # An utterance that had to be skipped is no reason to stop: the report says what is missing.
    mole-asr transcribe "$DATA/cuts_test.jsonl" --model "$OUT/model" --output "$OUT/transcripts" || [ -s "$hypothesis" ]
fi

# 5. The table. Spanish is scored without accents: the transcripts of the corpus are written without them.
if ! is_new "$OUT/report.txt" "$hypothesis"; then
    say "5/5 report: $OUT"
    curves=$(find "$OUT/logs" -name metrics.csv) # a training of a few steps leaves none
    mole-asr report "$DATA/cuts_test.jsonl" "$hypothesis" "$OUT" ${curves:+--logs "$OUT/logs"} --model "$OUT/model" \
        --seconds "$SECONDS" --fold-accents es >"$OUT/report.part"
    mv "$OUT/report.part" "$OUT/report.txt"
fi

# And one recording of your choice.
file=${FILE:-$DATA/audio/fr/queue-periodic-announce.wav}
say "$file"
mole-asr transcribe "$file" --model "$OUT/model" --format txt,json,srt --output "$OUT/transcripts"

say "the test split"
cat "$OUT/report.txt"
printf '\nfigures:  %s\npage:     %s\n' "$OUT/report.json" "$OUT/report.html"
