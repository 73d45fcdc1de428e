# On two CPU cores, one thread a process, the two halves of the second loop side by side.
set -e
export OMP_NUM_THREADS=1
python tests/coco_like.py datasets/coco_like --train 400 --val 100 --size 96 --seed 1
view="--img_root datasets/coco_like --min_size 96 --max_size 144 --anchor 8 --rois 64"
run="python detection/train_det.py $view --batch_size 8 --lr 0.005 --warmup 40 --eval_every 50 --print_freq 10"
run="$run --workers 0 --save_root runs/coco_like"
$run --kd_mode none --s_name fasterrcnn_resnet18 --iters 400 --note teacher
for seed in 1 2; do
    for mode in none reviewkd dkd reviewdkd; do
        teacher="--t_model runs/coco_like/teacher/model_best.pth.tar"
        [ $mode = none ] && teacher=
        $run --kd_mode $mode $teacher --s_name fasterrcnn_mobilenet_v2 --iters 200 --seed $seed --note $mode-$seed
    done
done
