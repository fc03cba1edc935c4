"""Which rows stay: cuts, groups, the policy for rows without a score, several packs, earlier scores."""
