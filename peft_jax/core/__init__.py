"""What every technique stands on: nodes, trees and binding. Knows JAX and Flax, and no
technique.
"""
