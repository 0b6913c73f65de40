"""Train the super-resolution stage: a generator of sharp frames from low-resolution ones (LongVideoGAN, section 3.2).

# Smallest command (a CPU, minutes)
python train_sres.py --dataset=datasets/labdoom --preset=toy

# The published recipe on 8 GPUs
torchrun --standalone --nproc_per_node=8 train_sres.py --dataset=datasets/horseback --batch=32 --gamma=1.0

It needs real clips at both sizes, but no low-resolution network: the two stages may train side by side. Run the same
command again and training continues where it stopped. --dry-run prints every option of a run. This is
`train.py longvideogan-sres`.
"""

from train import training_command

main = training_command("longvideogan-sres", __doc__)

if __name__ == "__main__":
    main()
