#!/usr/bin/env bash
# Dolma (Soldaini et al. 2024) -> rows of 2048 + 1 tokens with OLMo's tokenizer, on SLURM: the shape of the data that the
# published Pico models were trained on. The text of v1_7 is 4.5 TB compressed; v1_6-sample is 16 GB, to try it with.
#
#   DOLMA=/shared/dolma PARTITION=cpu VERSION=v1_6-sample bash examples/corpora/dolma.sh
#
# DOLMA is a folder that all nodes see. On disk it takes the compressed text, up to twice the uncompressed text meanwhile, and
# the rows. Run it where jobs are handed in; run it again to hand in what failed, or to see that all is there.
set -euo pipefail
: "${DOLMA:?a folder that all nodes see}" "${PARTITION:?a partition of the cluster}"
: "${VERSION:=v1_7}" "${ONE_IN:=1}" "${TASKS:=400}" "${TIME:=24:00:00}" "${MEMORY:=256}"
: "${TOKENIZER:=allenai/OLMo-7B-0724-hf}" "${SEQ_LEN:=2048}"
: "${LIST:=https://huggingface.co/datasets/allenai/dolma/resolve/main/urls/$VERSION.txt}"

# The files of the list, or one in $ONE_IN of them; what is there already is left, what broke off goes on. The folder in which
# a file lies becomes its source, where its documents do not name their own.
mkdir -p "$DOLMA/text"
curl --fail --silent --show-error --location "$LIST" | awk -v n="$ONE_IN" 'NF && NR % n == 0' > "$DOLMA/urls.txt"
fetch() {
    place="$1/$(basename "$(dirname "$2")")"
    mkdir -p "$place"
    [ -f "$place/$(basename "$2")" ] && return
    curl --fail --silent --show-error --location --retry 8 --continue-at - \
        --output "$place/.$(basename "$2").part" "$2" && mv "$place/.$(basename "$2").part" "$place/$(basename "$2")"
}
export -f fetch
xargs -P 16 -I {} bash -c 'fetch "$0" "$1"' "$DOLMA/text" {} < "$DOLMA/urls.txt"

pico data prepare "$DOLMA/text" --out "$DOLMA/rows" \
    --tokenizer "$TOKENIZER" --seq-len "$SEQ_LEN" --seed 42 --memory "$MEMORY" \
    --executor slurm --tasks "$TASKS" \
    --slurm partition="$PARTITION" --slurm time="$TIME" --slurm mem_per_cpu_gb=4
