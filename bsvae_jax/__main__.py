from bsvae_jax.cli import main

main()
