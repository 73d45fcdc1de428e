#!/bin/bash
# ResNet34 -> ResNet18 and ResNet50 -> MobileNetV1 at 224 pixels on a folder that looks like ImageNet's:
# 21 steps each, to see that everything runs. From the repository's root:
#     python tests/imagenet_like.py datasets/cifar10_jpeg datasets/imagenet_like --train 34 --val 4
#     bash results/imagenet_like/run.sh
set -e
OUT=results/imagenet_like
COMMON="--data_name imagenet --img_root datasets/imagenet_like --epochs 1 --batch_size 16 --workers 1 --cuda 0 --print_freq 7"
run() {  # NOTE SCRIPT FLAGS...
    note=$1; shift
    [ -f runs/imagenet_like/$note/result.json ] && return
    rm -rf runs/imagenet_like/$note
    python "$@" $COMMON --save_root runs/imagenet_like --note $note
    cp runs/imagenet_like/$note/log.txt $OUT/$note.log
}
for t in resnet34 resnet50; do
    run $t train_base.py --net_name torchvision/$t --protocol mdistiller-imagenet
done
for mode in st at ofd crd reviewkd dkd; do
    for pair in "resnet34 torchvision/resnet18" "resnet50 MobileNetV1"; do
        set -- $pair
        run $mode-$1 train_kd.py --kd_mode $mode --protocol mdistiller-imagenet \
            --t_model runs/imagenet_like/$1/model_best.pth.tar --s_name $2
    done
done
