"""Which rank stands where: `topology` is pure, `mesh` has process groups, `groups` joins them."""
