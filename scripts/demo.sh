#!/usr/bin/env bash
# The whole way on a small scene of the project's own: make it, train, evaluate, render a video.
# Usage: bash scripts/demo.sh [folder for everything it makes; default: <repository>/demo]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

folder="${1:-$repository/demo}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
scene="$folder/scene"
run="$folder/outputs/demo/latent-splatfacto/run"

# What nerfstudio's commands say of their own code before they load plugins.
export PYTHONWARNINGS='ignore:`torch.jit.script` is deprecated:FutureWarning,ignore:`torch.cuda.amp.custom_:FutureWarning'

step() { printf '\n== %s\n' "$*"; }

step "1/4 The scene: 48 ray-traced views of 256 x 256"
lrf demo-scene --output "$scene"

step "2/4 Training (ns-train)"
ns-train latent-splatfacto --data "$scene" --output-dir "$folder/outputs" --experiment-name demo --timestamp run \
    --vis tensorboard --max-num-iterations 2000 --logging.steps-per-log 100 --logging.local-writer.max-log-size 0

step "3/4 Evaluation on the held-out views (ns-eval)"
ns-eval --load-config "$run/config.yml" --output-path "$folder/metrics.json" --render-output-path "$folder/held_out"

step "4/4 A video through the held-out cameras (ns-render)"
ns-render interpolate --load-config "$run/config.yml" --output-path "$folder/video.mp4" \
    --pose-source eval --interpolation-steps 15

step "Done"
python - "$folder/metrics.json" <<'PYTHON'
import json
import sys

with open(sys.argv[1]) as file:
    results = json.load(file)["results"]
print("held-out views: " + ", ".join(f"{key} {results[key]:.3f}" for key in ("psnr", "ssim", "ceiling_psnr")))
PYTHON
cat <<TEXT
scene               $scene
trained field       $run
metrics             $folder/metrics.json
held-out views      $folder/held_out (photograph, what the VAE makes of it, the VAE's picture of the field, the scene decoder's)
video               $folder/video.mp4
look around in it   $environment/bin/ns-viewer --load-config $run/config.yml
TEXT
