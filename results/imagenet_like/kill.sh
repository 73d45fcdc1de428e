#!/bin/bash
# `st` of run.sh again, killed in the middle of its epoch and gone on with: the same weights.
COMMON="--data_name imagenet --img_root datasets/imagenet_like --epochs 1 --batch_size 16 --workers 1 --cuda 0 --print_freq 7"
RUN="train_kd.py --kd_mode st --protocol mdistiller-imagenet --t_model runs/imagenet_like/resnet34/model_best.pth.tar
    --s_name torchvision/resnet18 $COMMON --save_root runs/imagenet_like --note killed --save_every 0.1"
rm -rf runs/imagenet_like/killed
python $RUN & process=$!
until [ -f runs/imagenet_like/killed/checkpoint.pth.tar ]; do sleep 0.2; done
sleep 5
kill -KILL $process
wait $process
python - <<'P'
import utils
print("killed; the checkpoint is of step", utils.read_checkpoint("runs/imagenet_like/killed/checkpoint.pth.tar")["inside"]["step"])
P
python $RUN --resume
python - <<'P'
import torch, utils
whole, killed = (utils.read_checkpoint(f"runs/imagenet_like/{x}/checkpoint.pth.tar") for x in ("st-resnet34", "killed"))
same = all(torch.equal(x, killed["snet"][key]) for key, x in whole["snet"].items())
print("weights equal to the undisturbed run's:", same, "  history:", whole["history"] == killed["history"])
P
