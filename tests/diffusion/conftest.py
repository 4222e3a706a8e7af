from tests.diffusion.bases import base, latent_base, latent_folder, one_thread, pixel_folder

__all__ = ["base", "latent_base", "latent_folder", "one_thread", "pixel_folder"]
