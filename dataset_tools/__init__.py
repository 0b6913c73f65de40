"""Make datasets: footage of any kind becomes sharded zips of JPEG frames that training reads."""
