"""What the commands of ``privacy`` do: they bring its mathematics and the federation's data and models together."""
