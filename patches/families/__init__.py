"""One file of facts for each family of models; a family without a fact needs no file."""
