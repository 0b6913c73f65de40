"""Dataset makers: convert videos, images and simulations to the sharded zips of JPEG frames that training reads."""
