# KnowledgeReview's first row, on a folder of 2000 training and 500 test images of 32 pixels.
set -e
common="--protocol knowledgereview --img_root datasets/cifar10_jpeg_2k --epochs 2 --batch_size 32 --milestones 2"
common="$common --print_freq 10 --save_every 10 --save_root runs/knowledgereview"
export OMP_NUM_THREADS=1
python train_base.py --net_name torchvision/resnet50 --data_name imagefolder --lr 0.02 $common --note resnet50
python train_kd.py --kd_mode reviewkd --t_model runs/knowledgereview/resnet50/model_best.pth.tar \
    --s_name torchvision/mobilenet_v2 $common --note mobilenet_v2
