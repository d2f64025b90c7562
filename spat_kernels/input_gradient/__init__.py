"""How the gradient of the loss with respect to the images is computed."""
