#!/usr/bin/env bash
# Dolma (Soldaini et al. 2024) -> chunks of 2048 + 1 tokens with OLMo's tokenizer, by datatrove on SLURM: the shape of the data that the
# published Pico models were trained on. The text of v1_7 is 4.5 TB compressed; v1_6-sample is 16 GB, to try it with.
#
#   DOLMA=/shared/dolma PARTITION=cpu VERSION=v1_6-sample bash examples/corpora/dolma.sh
#
# DOLMA is a folder that all nodes see. On disk it takes the compressed text, and the tokens twice. Run it where jobs are handed in;
# run it again to hand in what failed.
set -euo pipefail
: "${DOLMA:?a folder that all nodes see}" "${PARTITION:?a partition of the cluster}"
: "${VERSION:=v1_7}" "${ONE_IN:=1}" "${TASKS:=400}" "${TIME:=24:00:00}"
: "${TOKENIZER:=allenai/OLMo-7B-0724-hf}" "${SEQ_LEN:=2048}" "${EOS:=<|endoftext|>}"
: "${LIST:=https://huggingface.co/datasets/allenai/dolma/resolve/main/urls/$VERSION.txt}"

# The files of the list, or one in $ONE_IN of them; what is there already is left, what broke off goes on. They
# lie in a folder for each source.
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

# The tokenizer in one file, and the tokens by datatrove: one array of jobs; what is finished is not handed in again.
"${PYTHON:-python}" - "$TOKENIZER" "$DOLMA/tokenizer.json" <<'END'
import sys
from tokenizers import Tokenizer
Tokenizer.from_pretrained(sys.argv[1]).save(sys.argv[2])
END
"${PYTHON:-python}" "$(dirname "$0")/tokenize_with_datatrove.py" "$DOLMA/text" "$DOLMA/tokens" \
    --tokenizer "$DOLMA/tokenizer.json" --eos "$EOS" --seq-len "$SEQ_LEN" \
    --executor slurm --tasks "$TASKS" --partition "$PARTITION" --time "$TIME"
# Then: pico train CONFIG.yaml data.dataset.name=datatrove:$DOLMA/tokens data.dataset.shuffle=true
