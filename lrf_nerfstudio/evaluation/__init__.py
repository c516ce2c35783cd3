"""Measures of pictures and latents, and the tables and figures made from them."""
