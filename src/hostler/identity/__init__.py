"""Who is calling, what they may do, and the trail of it: certificates, tokens, invitations, authorization, audit."""
