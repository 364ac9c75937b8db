"""Training: the method's modules, their configuration, data sets, the training run and the checkpoint.

The main path reads from `autoencoder.py`: encoder, Q-Former, decoder, perceptual network, score. Importing this
package loads nothing heavy; the modules do.
"""
