#!/usr/bin/env bash
# Every run of this folder. datasets/cifar10_jpeg_5k and _1k: image folders, train/<class>/* and test/<class>/*
set -euo pipefail
cd "$(dirname "$0")/../.."
PY=${PY:-.venv/bin/python}
MINE=results/own_networks/my_net.py
AT64="--data_name imagefolder --img_root datasets/cifar10_jpeg_5k --img_size 64"
AT224="--data_name imagefolder --img_root datasets/cifar10_jpeg_1k --img_size 224 --workers 2"
COMMON="--lr 0.02 --save_root runs/own"

# teachers and the baseline, on an image folder at 64 pixels
$PY train_base.py --net_name torchvision/resnet18 $AT64 --epochs 6 $COMMON --note resnet18
$PY train_base.py --net_name $MINE:small_vit $AT64 --epochs 6 $COMMON --note vit
$PY train_base.py --net_name $MINE:build $AT64 --epochs 4 $COMMON --note baseline

# torchvision's ResNet-18 teaches a network of your own
for flags in "at --lambda_kd 50" ofd crd reviewkd; do
    $PY train_kd.py --kd_mode $flags --t_name torchvision/resnet18 --t_model runs/own/resnet18/model_best.pth.tar \
        --s_name $MINE:build --epochs 4 $COMMON --note resnet18-${flags%% *}
done

# a small vision transformer teaches it
for flags in st "at --lambda_kd 50"; do
    $PY train_kd.py --kd_mode $flags --t_name $MINE:small_vit --t_model runs/own/vit/model_best.pth.tar \
        --s_name $MINE:build --epochs 4 $COMMON --note vit-${flags%% *}
done

# 224 pixels, read by worker processes
$PY train_base.py --net_name $MINE:build $AT224 --epochs 6 $COMMON --note build-224
$PY train_kd.py --kd_mode at --lambda_kd 50 --t_name $MINE:build --t_model runs/own/build-224/model_best.pth.tar \
    --s_name torchvision/shufflenet_v2_x0_5 --workers 2 --epochs 6 $COMMON --note build-224-at
