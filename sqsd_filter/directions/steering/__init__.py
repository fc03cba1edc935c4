"""Does a direction do to the model what its name says? The model at θ0 + αV, over a range of α."""
