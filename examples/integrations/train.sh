#!/bin/sh
# A training script in no particular language: prints a loss for each epoch, saves its work on
# SIGTERM, and prints its value at the end.
trap 'echo "saved after epoch $epoch"; exit 0' TERM
for epoch in 1 2 3; do
    loss=$(awk -v width="$1" -v epoch="$epoch" 'BEGIN { print 1 / width + 1 / epoch }')
    echo "{\"step\": $epoch, \"value\": $loss}"
done
echo "{\"value\": $loss}"
