"""The networks of ViTGAN; nothing here knows of training or of data."""
