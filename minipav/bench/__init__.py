"""How fast it is: python -m minipav.bench"""
