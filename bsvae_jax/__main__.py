from bsvae_jax.cli.main import main

main()
