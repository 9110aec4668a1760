"""The command `vqvae2 app`: a page in the browser that samples and edits images, and shows levels and codes."""
