"""Does a direction have the effect that its name says? The model at θ0 + αV, over a range of α."""
