#!/usr/bin/env bash
# A folder of text on a laptop, prepared by all of its processors.
#
#   bash examples/corpora/laptop.sh MY_TEXTS MY_ROWS
#
# Stop it whenever you like: the same command continues. Files: .txt .md .jsonl .parquet, also .gz and .zst; the first folder below
# MY_TEXTS is the source of a row.
set -euo pipefail
texts=${1:?which folder has the text?} rows=${2:?which folder is to be made?}

pico data prepare "$texts" --out "$rows" \
    --deduplicate --filter length,min_characters="${MIN_CHARACTERS:-200}" \
    --vocab-size "${VOCAB_SIZE:-4096}" --seq-len "${SEQ_LEN:-512}" --val-fraction 0.02 --seed 42
pico data verify "$rows"
pico data inspect "$rows"
