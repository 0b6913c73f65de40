"""Train the low-resolution stage: a generator of long clips (LongVideoGAN, section 3.1).

# Smallest command (a CPU, minutes)
python train_lres.py --dataset=datasets/labdoom --preset=toy

# The published recipe on 8 GPUs
torchrun --standalone --nproc_per_node=8 train_lres.py --dataset=datasets/horseback --batch=64 --grad-accum=2

Run the same command again and training continues where it stopped. --dry-run prints every option of a run. This is
`train.py longvideogan-lres`.
"""

from train import training_command

main = training_command("longvideogan-lres", __doc__)

if __name__ == "__main__":
    main()
