"""`steer-server sae`: evidence, labels and fidelity of sparse autoencoders."""
