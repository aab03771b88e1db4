# Varnish as a peer of `loadtest bench` in the workload `denied`, which needs the vmod vsthrottle (Debian: varnish-modules).
# @NAME@ is replaced when the peer starts.
vcl 4.1;

import vsthrottle;

backend origin {
    .host = "@HOST@";
    .port = "@PORT@";
}

sub vcl_recv {
    if (req.url ~ "^/denied/" && vsthrottle.is_denied(client.identity, 1, 1h)) {
        return (synth(429));
    }
    return (pass);
}
