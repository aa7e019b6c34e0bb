"""`vitlit benchmark ...`: how fast this machine loads images, and how fast it trains a ViT."""
